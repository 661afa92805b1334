"""What ``pcenet train`` does, from options to a trained network, on Lightning Fabric."""

"""Cost of PCE against its dense twin: time, latency and memory, side by side in one process."""

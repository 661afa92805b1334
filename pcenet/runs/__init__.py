"""What a run is: its options, its folder, and what its files hold. Importing it is cheap: ``--help`` needs it."""

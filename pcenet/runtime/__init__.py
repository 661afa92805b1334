"""Where code runs: device, precision and threads, processes that train together, signals, memory."""

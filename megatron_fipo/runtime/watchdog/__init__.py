"""What runs beside each rank: hears signals, sees ranks die and runs hang, and ends them in good order."""

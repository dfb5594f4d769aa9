"""Files and folders that are there whole or not at all, their hashes, arrays and JSON, and what disks refuse."""

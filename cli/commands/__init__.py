"""Run the commands, one file each: call the library and print."""

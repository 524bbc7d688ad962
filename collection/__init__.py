"""What collect_demos.py does: attempts of the scripted expert, and the files that its demonstrations come into."""

"""What check_demos.py does: demonstrations examined whole, what is wrong, what is odd, what they look like."""

"""The tabs of the page, a file for each: laid out, and connected to what they show."""

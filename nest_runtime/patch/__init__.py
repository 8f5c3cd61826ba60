"""What a patch is: values, the file format, and arithmetic between patches. Needs no model."""

"""The contract of `fire`: tables, configuration, receipts and errors. Imports no other part of the project."""

"""Receipts, which undo a merge, and the records that resume one."""

"""The steps of `data.prepare`: read, check, spool, sort, merge, encode, write."""

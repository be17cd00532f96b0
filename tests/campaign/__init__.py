"""The campaign: hostile inputs, faults and odd surroundings, each a case in a table, run through the command line."""

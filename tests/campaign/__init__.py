"""The campaign: hostile inputs, faults and unusual environments, as tables of cases run through the command line."""

"""``coordexp doctor``: what on this machine, in a checkpoint or in a data file would spoil a run."""

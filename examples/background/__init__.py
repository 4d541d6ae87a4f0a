"""Work after the commit, and only after one."""

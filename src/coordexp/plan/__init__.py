"""Will it fit? Memory a process of an experiment needs, its steps and epochs, before anything is loaded."""

"""Studies: is it worth to recycle a pool's adapters for a task?"""

"""Pictures as PNG or SVG: the only user of matplotlib. Equal numbers give equal bytes."""

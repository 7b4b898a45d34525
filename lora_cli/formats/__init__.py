"""Files of adapters, models and results: read strictly, written whole."""

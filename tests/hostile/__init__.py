"""What strangers may put into an adapter's folder, made on the spot: `write_corpus(folder)`."""

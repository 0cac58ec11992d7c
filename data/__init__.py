"""All that is known before a model runs: documents, labels, windows, questions, ground truth."""

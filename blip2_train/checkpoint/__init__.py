"""Files of weights: ours, the reference's, BERT's."""

"""Loss, answers and scores of a split, in training and afterwards."""

"""Loss, answers and scores of a split, during training and afterwards."""

"""The workshop: concepts, stimuli, directions, polarity, SAEs, atom names, evaluation: stages of one recipe."""

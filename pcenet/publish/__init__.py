"""``pcenet push``: the network of a run to the Hugging Face Hub, with a card that says what the run found."""

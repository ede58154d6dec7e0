"""Tables, cards, pictures and progress of results."""

"""What an edit does to a prediction, token by token: the definition (`reference`) and ways that need less memory and time."""

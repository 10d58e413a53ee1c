"""What a trained model is worth, measured without training it further."""

"""Models in Hugging Face's folders: export, import, and the model class of the families that transformers lacks."""

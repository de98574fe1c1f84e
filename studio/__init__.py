"""Adapter Studio's pages: a Gradio app over `engine`. Importing it loads neither torch nor transformers."""

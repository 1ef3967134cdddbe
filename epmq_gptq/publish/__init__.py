"""What a finished checkpoint is shown with: model card, upload, report page."""

"""The demo model's files, its drawn scenes, and the judges that measure pictures of them: judge, quality, warmth.

The programs that train the model are in tools/build_demo."""

# Fetches MODEL at REVISION into TARGET, once for all pods that share the volume.
test ! -e "$TARGET/.complete" || exit 0
mkdir -p "$TARGET"
exec 9>"$TARGET/.lock"
flock 9
test ! -e "$TARGET/.complete" || exit 0
hf download "$MODEL" --revision "$REVISION" --local-dir "$TARGET"
touch "$TARGET/.complete"

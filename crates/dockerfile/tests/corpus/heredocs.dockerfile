FROM busybox
RUN <<EOF
set -e
echo "$HOME"
EOF
RUN cat <<A - <<-"B" 3<<'C' && true
a
A
	b
	B
c
C
COPY <<one <<-two <<'three' plain /dst/
first $A
one
	second
	two
third $A
three
ADD <<x.txt /x.txt
x.txt
ONBUILD RUN <<EOF
echo $1
EOF
ONBUILD COPY <<EOF /y
y
EOF
CMD ["<<EOF"]

# The three methods of main.py on the example models; run it in the folder above this one.
#   sh examples/merge.sh
python main.py ./merged-ties --base-model examples/base \
    --merge examples/reverse --merge examples/upper --weight 1 --density 0.5 --no-normalize
python main.py ./merged-linear --method linear \
    --merge examples/reverse --weight 0.6 --merge examples/upper --weight 0.4
python main.py ./merged-slerp --method slerp \
    --merge examples/reverse --merge examples/upper --weight 0.5

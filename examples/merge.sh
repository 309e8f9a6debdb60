# Every method of main.py on the example models; run it in the folder above this one.
#   sh examples/merge.sh && python examples/evaluate.py merged-*
# Weights were chosen once, before any result was seen: 1 where changes are added up, equal shares
# where models are averaged.

# Averages of models, or of what they changed of the base.
python main.py ./merged-linear --method linear --weight 0.5 \
    --merge examples/reverse --merge examples/upper
python main.py ./merged-slerp --method slerp --weight 0.5 \
    --merge examples/reverse --merge examples/upper
python main.py ./merged-nuslerp --method nuslerp --base-model examples/base --weight 0.5 \
    --merge examples/reverse --merge examples/upper
python main.py ./merged-multislerp --method multislerp --base-model examples/base --weight 0.5 \
    --merge examples/reverse --merge examples/upper
python main.py ./merged-karcher --method karcher \
    --merge examples/reverse --merge examples/upper
python main.py ./merged-model_stock --method model_stock --base-model examples/base \
    --merge examples/reverse --merge examples/upper

# Sums of changes, all or some of them.
python main.py ./merged-task_arithmetic --method task_arithmetic --base-model examples/base \
    --merge examples/reverse --merge examples/upper --weight 1
python main.py ./merged-ties --method ties --base-model examples/base \
    --merge examples/reverse --merge examples/upper --weight 1 --density 0.5 --no-normalize
python main.py ./merged-dare_linear --method dare_linear --base-model examples/base \
    --merge examples/reverse --merge examples/upper --weight 1 --density 0.5
python main.py ./merged-dare_ties --method dare_ties --base-model examples/base \
    --merge examples/reverse --merge examples/upper --weight 1 --density 0.5
python main.py ./merged-della_linear --method della_linear --base-model examples/base \
    --merge examples/reverse --merge examples/upper --weight 1 --density 0.5
python main.py ./merged-della --method della --base-model examples/base \
    --merge examples/reverse --merge examples/upper --weight 1 --density 0.5 --no-normalize
python main.py ./merged-breadcrumbs --method breadcrumbs --base-model examples/base \
    --merge examples/reverse --merge examples/upper --weight 1 --density 0.9
python main.py ./merged-breadcrumbs_ties --method breadcrumbs_ties --base-model examples/base \
    --merge examples/reverse --merge examples/upper --weight 1 --density 0.9
python main.py ./merged-sce --method sce --base-model examples/base \
    --merge examples/reverse --merge examples/upper
python main.py ./merged-ram --method ram --base-model examples/base \
    --merge examples/reverse --merge examples/upper
python main.py ./merged-ramplus_tl --method ramplus_tl --base-model examples/base \
    --merge examples/reverse --merge examples/upper

# One model merged into another, which takes the place of the base.
python main.py ./merged-nearswap --method nearswap --base-model examples/reverse \
    --merge examples/upper --weight 0.002
python main.py ./merged-arcee_fusion --method arcee_fusion --base-model examples/reverse \
    --merge examples/upper

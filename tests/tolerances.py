"""Every tolerance of the suite, in one place; each loose one says why."""

ORACLE = 1e-10  # float64 traces of the reference rule, weights and probabilities
EXACT_FLOAT64 = 1e-12  # same sums in another order, float64
COUNTED_FLOPS = 1e-3  # predicted against counted; measured 0, and 4e-4 where a lone last tensor is active
COUNTED_FLOPS_8B = 1e-2  # rotary products and norms are not predicted
PEAK_MEMORY = 0.05  # an estimate: what is freed between two allocations is not followed; measured -0.035 to 0.04
SUM = 1e-9  # sums of probabilities, as promised by the projections
BANDIT_SCALE = 1e-6  # a factor that is no power of two rounds each norm; 300 steps carry that on
FUSED_HEAD = 1e-6  # TRL's fused head keeps float32 statistics even in float64
REMEMBERED = 1e-5  # a gradient that the fused head's statistics move may round to the next bfloat16
TRAJECTORY = 1e-11  # eight steps carry on what each rounds, float64
LOSS_SCALE = 1e-9  # the 1e-12 that keeps e finite is not scaled with the loss
MERGED_LOGITS = 1e-5  # float32: (W + BA) x against W x + B A x, logits of about 1
ASCENT = 1e-4  # projected ascent on a quadratic, 50 to 300 steps, against the secular equation
CENTRAL_DIFFERENCES = 1e-4  # of gradients in float64, step 1e-3 of the parameters' length
KRYLOV = 1e-9  # all Lanczos steps, float64
FLOAT32_NORMS = 1e-5  # relative: Llama's norms compute in float32 even where all weights are float64
FLOAT32_ANGLES = 1e-6  # rotary angles are float32, and left padding shifts them; measured 2e-8 of gradients
FLOAT16 = 1e-2  # what float16 rounds away at the lower end of its range depends on the loss scale
FIRST_ORDER = 0.02  # a loss rise over rho |g|: second order is a percent at these radii, a wrong token far more
ROOT = 1e-8  # the radius in weight space comes from below: what it leaves of rho after its last step
SOLVED_BUDGET = 1e-3  # draws with a fixed seed; a share is found by halving an interval
SIMULATED_PICTURE = 0.3  # of its numbers: sampled steps carry on what CPUs round differently; 0.25 moved once

"""Default prompts on which the std of a text encoder's output is measured."""

PROMPTS = tuple(
    """
a red apple on a wooden table
a black cat sleeping on a windowsill in the afternoon sun
an old stone bridge over a river in autumn
a photograph of a city street at night after rain, neon signs reflected in the puddles
portrait of an elderly fisherman with a grey beard, soft window light
two children flying a kite on a beach
a bowl of ramen with a boiled egg, spring onions and steam rising
a watercolor painting of a lighthouse on a cliff
snow covered mountains under a clear blue sky
a yellow bicycle leaning against a brick wall
an astronaut riding a horse on the moon, highly detailed
a bouquet of sunflowers in a glass vase, oil painting
a train crossing a viaduct in the early morning fog
three hot air balloons above a desert
a library with tall shelves and a spiral staircase
close-up of a dragonfly on a blade of grass
a steam locomotive, black and white photograph, 1930s
a woman reading a newspaper in a small cafe in Paris
a futuristic skyline at sunset with flying vehicles
a golden retriever puppy running through a meadow
a minimalist living room with a green sofa and a large plant
an isometric drawing of a tiny island with a house and a windmill
a pencil sketch of a sailing ship in a storm
a market stall with oranges, lemons and grapes
a fox in a snowy forest, digital illustration
the interior of a gothic cathedral, rays of light through stained glass
a chef preparing sushi behind a counter
a blue vase, a white cup and a silver spoon on a tablecloth
aerial view of terraced rice fields
a robot playing chess with a man in a park
a dancer in a long white dress, motion blur
an empty road through a desert leading to distant mountains, wide angle
a bird
macro photo of water drops on a spider web
a medieval village with half-timbered houses, a blacksmith at work, chickens in the lane and a castle on the hill behind
a jazz band on a small stage
a low poly render of a mountain lake
a cup of coffee next to an open notebook and a fountain pen, top view
a whale breaching at dawn
a child's drawing of a family in front of a house
""".strip().splitlines()
)

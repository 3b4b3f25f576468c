"""Common English words and names, of which the keys of needles and the entries of phone books are made."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence


def _words(text: str) -> list[str]:
    return text.split()


ADJECTIVES = _words("""
abrupt absent ample ancient angry anxious awake aware bad bare basic bent big bitter black blank bleak blind blue blunt
bold bossy brave brief bright brisk broad broken brown bumpy busy calm careful cheap cheerful chief chilly civil clean
clear clever close cloudy clumsy cold cool corny cosy crazy creamy crisp crowded cruel curly curved cute damp dark deaf
dear deep dense dim dirty distant dizzy double dry dull dusty eager early easy elastic elder empty equal even exact
exotic extra faint fair faithful false famous fancy fast fat fatal fierce fine firm fit flat foggy formal frail free
fresh friendly frosty full funny gentle giant glad global glossy golden good grand grateful grave gray great greedy
green grim gross grumpy guilty handsome handy happy hard harsh hasty heavy helpful hidden high hollow honest huge humble
hungry icy ideal idle ill itchy jealous jolly juicy keen kind known lame large late lazy lean level light likely lively
lonely long loose loud lovely low loyal lucky mad magenta major mean mellow messy mild minor misty modern modest moist
muddy narrow nasty naughty neat nervous new nice nimble noble noisy normal numb obvious odd old open orange ordinary
outer pale past patient perfect petite pink plain pleasant polite poor pretty prickly prior proud public pure purple
quaint quick quiet rapid rare raw ready real rich ripe rough round royal rude rusty sad safe salty scared scary secret
selfish serious shaky shallow sharp shiny short shy silent silly silver simple skinny sleepy slim slippery slow small
smart smooth sober soft solid sore sour spare spicy spotty steady steep sticky stiff still stormy strange strict strong
stupid sturdy subtle sudden sunny super sweet swift tall tame tan tasty tender tense terrible thick thin thirsty tidy
tight tiny tired tough tricky true ugly uneven unique upset urban useful usual vague vain vast velvet vivid warm wary
weak wealthy weary wet whole wicked wide wild wise witty wooden woolly worried worthy wrong yellow young zany
""")

NOUNS = _words("""
accident acorn actor address airport album alley anchor animal ankle answer apple apron arch arena arm armchair army
arrow artist atlas attic aunt author autumn avenue axe baby bacon badge bag baker balcony ball balloon banana band bank
banner barber barrel basin basket bat bath beach bead beak beam bean bear beard beast bed bee beetle bell belt bench
berry bicycle bird birth biscuit blade blanket block board boat body bolt bone book boot border bottle bow bowl box boy
bracket brain branch bread breakfast brick bridge brother brush bubble bucket bug builder bulb bull bus bush butter
button cabbage cabin cable cactus cake calendar camera camp canal candle candy canoe canvas cap captain car card cargo
carpet carrot cart castle cat cave ceiling cellar cello chain chair chalk channel cheese cherry chess chest chicken
child chimney chin church circle city clay clock cloth cloud clown club coach coast coat coffee coin collar colour comb
comet compass cook copper coral cord corn corner cotton country cousin cow crab cradle crane crater crayon cream creek
crow crowd crown cup cupboard curtain cushion daisy dance daughter dawn deer desert desk diamond diary dinner dish
doctor dog doll dolphin donkey door dragon drain drawer dream dress drum duck dust eagle ear earth edge egg elbow
elephant engine envelope evening eye face factory falcon family farm farmer feast feather fence field fig finger fire
fish flag flame flock floor flower flute fly foot forest fork fox frame friend frog fruit galaxy garage garden garlic
gate ghost giraffe girl glacier glass globe glove goat gold goose grape grass guest guitar hair hall hammer hand harbour
hat hawk head heart hedge hen hill hip hole holiday honey hook horn horse hospital hotel hour house husband ice insect
island jacket jail jam jar jelly jewel joke judge jug juice jungle kettle key king kitchen kite kitten knee knife knot
ladder lady lake lamp land lantern laugh leaf leather leg lemon letter library lily lion lip lizard lock lunch machine
magnet maid map marble market mask match meadow meal medal melon metal milk mirror mist money monkey month moon morning
moss mother motor mountain mouse mouth mud mug muscle museum music nail neck needle nephew nest net night north nose
notebook number nurse nut oak ocean office oil onion orchard otter oven owl page paint palace pan paper parcel park
parrot party path pea peach peacock pear pebble pen pencil pepper person pest piano picture pie pig pigeon pillow pilot
pin pine pipe planet plant plate plough pocket poem poet pond pony porch potato pudding puddle pumpkin puppet puppy
quartz queen quilt rabbit radio rail rain rainbow raven recipe rice ring river road robin rocket roof room root rope
rose sail salt sand scarf school scissors screw sea seat seed sheep shelf ship shirt shoe shop shore sister skate ski
skin skirt sky sleet slope smile smoke snail snake snow soap sock soda sofa soldier son song soup spade spark spider
sponge spoon spring spy squirrel stable stage stair stamp star station steam stem stew stick stocking stone store storm
story stove stranger straw stream street sugar suit sun table tail tailor teacher team temple tent thread throat throne
thumb ticket tiger toad toast toe tomato tongue tooth tower town toy trail train tray tree trick truck trumpet tub tulip
tunnel turkey turtle uncle valley van vase veil vein vest village violin voice volcano voyage wagon waist wall walnut
war wasp watch water wave wax weather whale wheat wheel whip whistle widow wife wind window wine wing winter wire wish
witch wolf woman wood wool word worm wren wrist writer yard yarn year zebra zipper
""")

FIRST_NAMES = _words("""
Aaron Abigail Adam Agnes Alan Albert Alice Allison Amanda Amber Amy Andrea Andrew Angela Anita Ann Anna Anthony April
Arthur Ashley Audrey Barbara Barry Beatrice Benjamin Bernard Beth Betty Beverly Bonnie Bradley Brandon Brenda Brian
Bruce Bryan Calvin Carl Carlos Carmen Carol Caroline Catherine Chad Charles Cheryl Christina Christopher Cindy Clara
Clarence Claude Connie Craig Crystal Curtis Cynthia Dale Daniel Danielle David Dawn Deborah Dennis Diana Diane Donald
Donna Doris Dorothy Douglas Earl Eddie Edith Edna Edward Edwin Eileen Elaine Eleanor Elizabeth Ellen Emily Emma Eric
Erica Erin Ernest Esther Ethel Eugene Eva Evelyn Florence Frances Francis Frank Fred Gail Gary George Gerald Gladys
Glenn Gloria Gordon Grace Gregory Hannah Harold Harry Hazel Heather Helen Henry Herbert Holly Howard Irene Jack Jackie
Jacob Jacqueline James Jamie Jane Janet Janice Jason Jean Jeffrey Jennifer Jeremy Jerome Jerry Jesse Jessica Jill Jimmy
Joan Joann Joe John Jonathan Jose Joseph Joshua Joyce Juan Juanita Judith Judy Julia Julie Justin Karen Katherine
Kathleen Kathryn Keith Kelly Kenneth Kevin Kimberly Larry Laura Lauren Lawrence Leo Leon Leonard Leroy Leslie Lillian
Linda Lisa Lloyd Lois Lori Lorraine Louis Louise Lucille Lucy Luis Lynn Manuel Marcus Margaret Maria Marie Marilyn
Marion Marjorie Mark Martha Martin Marvin Mary Matthew Maureen Megan Melanie Melissa Melvin Michael Michele Mildred
Monica Nancy Nathan Nicholas Nicole Norma Norman Oscar Pamela Patricia Patrick Paul Paula Pauline Peggy Peter Philip
Phyllis Rachel Ralph Ramona Raymond Rebecca Regina Renee Rhonda Richard Rita Robert Roberta Robin Rodney Roger Ronald
Rosa Rose Roy Ruby Russell Ruth Ryan Sally Samantha Samuel Sandra Sara Scott Sean Shannon Sharon Shawn Sheila Sherry
Shirley Stacy Stanley Stephanie Stephen Steven Sue Susan Suzanne Sylvia Tammy Tanya Teresa Terry Thelma Theodore Theresa
Thomas Tiffany Tim Timothy Tina Todd Tony Tracy Travis Valerie Vanessa Vera Vernon Veronica Victor Victoria Vincent
Viola Virginia Vivian Walter Wanda Wayne Wendy Wesley William Willie Wilma Yolanda Yvonne Zachary
""")

LAST_NAMES = _words("""
Adams Alexander Allen Anderson Andrews Armstrong Arnold Austin Bailey Baker Banks Barker Barnes Barnett Barrett Bates
Beck Bell Bennett Berry Bishop Black Blair Boone Bowen Bowman Boyd Bradley Brady Brewer Briggs Brooks Brown Bryant
Buchanan Burgess Burke Burnett Burns Burton Bush Butler Byrd Caldwell Campbell Cannon Carlson Carpenter Carr Carroll
Carson Carter Casey Castillo Castro Chambers Chandler Chapman Chavez Christensen Clark Clarke Clayton Cohen Cole Coleman
Collier Collins Conner Cook Cooper Cox Craig Crawford Cross Cruz Cummings Cunningham Curry Curtis Daniels Davidson Davis
Dawson Day Dean Delgado Dennis Diaz Dixon Douglas Doyle Duncan Dunn Edwards Elliott Ellis Erickson Evans Farmer Ferguson
Fernandez Fields Fisher Fitzgerald Fleming Fletcher Flores Flynn Ford Foster Fowler Fox Francis Franklin Frazier Freeman
French Fuller Garcia Gardner Garner Garrett George Gibbs Gibson Gilbert Glover Gomez Gonzales Goodman Goodwin Gordon
Graham Grant Graves Gray Green Greene Greer Griffin Griffith Gross Guerrero Guzman Hale Hall Hamilton Hammond Hampton
Hansen Hanson Hardy Harmon Harper Harrington Harris Harrison Hart Harvey Hawkins Hayes Haynes Henderson Henry Hensley
Hernandez Herrera Hicks Higgins Hill Hines Hodges Hoffman Holland Holloway Holmes Holt Hopkins Horton Houston Howard
Howell Hubbard Hudson Huff Hughes Hunt Hunter Ingram Jackson Jacobs Jefferson Jenkins Jennings Jensen Jimenez Johnson
Johnston Jones Jordan Joseph Keller Kelley Kennedy King Klein Knight Lambert Lane Larson Lawson Lee Leonard Lewis Little
Logan Long Lopez Love Lowe Lucas Luna Lynch Lyons Mack Maldonado Malone Mann Manning Marshall Martinez Mason Matthews
Maxwell May McCarthy McCoy McDonald McGee McKinney Medina Mejia Mendoza Meyer Miles Miller Mills Mitchell Montgomery
Moore Morales Moran Moreno Morgan Morris Morrison Morton Mullins Munoz Murphy Murray Myers Nelson Newman Newton Nguyen
Nichols Norris Norton Nunez Obrien Oliver Olson Ortega Ortiz Osborne Owens Padilla Page Palmer Parker Parks Parsons
Patterson Payne Pearson Pena Perez Perkins Perry Peters Peterson Phelps Phillips Pierce Pittman Poole Pope Porter Potter
Powell Powers Pratt Price Quinn Ramirez Ramos Ramsey Reed Reese Reeves Reid Reyes Reynolds Rhodes Rice Richards
Richardson Riley Rios Rivera Robbins Roberts Robertson Robinson Rodgers Rodriguez Rogers Romero Rose Ross Rowe Ruiz
Russell Salazar Sanchez Sanders Santiago Santos Saunders Schmidt Schneider Schultz Schwartz Sharp Shaw Shelton Sherman
Silva Simmons Simon Simpson Sims Singleton Smith Snyder Soto Sparks Spencer Stanley Steele Stephens Stevens Stewart
Stokes Stone Strickland Sullivan Summers Sutton Swanson Taylor Terry Thompson Thornton Todd Torres Townsend Tucker
Turner Tyler Underwood Valdez Vargas Vasquez Vaughn Vega Wade Wagner Walker Wallace Walsh Walters Walton Ward Warner
Warren Washington Watkins Watson Watts Weaver Webb Weber Webster Welch Wells West Wheeler White Williams Willis Wilson
Wise Wolfe Wood Woods Wright Yates Young Zimmerman
""")


def pairs(rng: random.Random, first: Sequence[str], second: Sequence[str], between: str) -> Iterator[str]:
    """Distinct pairs of words in random order, as many as there are."""
    seen: set[int] = set()
    while len(seen) < len(first) * len(second):
        number = rng.randrange(len(first) * len(second))
        if number not in seen:
            seen.add(number)
            yield first[number // len(second)] + between + second[number % len(second)]

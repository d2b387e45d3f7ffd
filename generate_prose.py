"""Simple English prose from a small grammar of our own: stories, talks, letters, and more.

Each document is planned first (who, where, when, which trouble, which way out) and then told, so
names, pronouns, objects, time of day, and weather agree from beginning to end.

In the tables, ``{one|two}`` picks one alternative, ``[key]`` is a fact of the document, ``<rule>``
the next card of a shuffled pile; a capital in a key or rule gives the text a capital. A paragraph
may end at ``~`` and must at ``#``, and ``^`` starts a line. ``$key`` begins a fact, ``@rule`` a
list divided by `` / ``, ``=`` a record, and ``q > a`` is a question with its answer.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from hamner.files import write_json_lines

MIN_WORDS, MAX_WORDS = 60, 220
STATS_DOCUMENTS = 5000
PRONOUNS = {"she": ("she", "her", "her", "girl"), "he": ("he", "him", "his", "boy")}
HELPERS = {"out": ("kin", "friend", "job"), "home": ("kin",), "talk": ("kin", "friend")}
_Record = tuple[dict[str, str], dict[str, list[str]]]


def _records(block: str) -> list[_Record]:
    """Parse a table: for each record its facts, to be bound in order, and its rules."""
    records = []
    for entry in " ".join(block.split()).split("= ")[1:]:
        marks = re.split(r" ?([$@])(\w+) ", entry)[1:]
        found = list(zip(marks[::3], marks[1::3], marks[2::3], strict=True))
        rules = {key: text.strip().split(" / ") for mark, key, text in found if mark == "@"}
        records.append(({key: text for mark, key, text in found if mark == "$"}, rules))
    return records


RULES = _records("""
= @she Anna / Mia / Lena / Clara / Nora / Ella / Ida / Zoe / Tess / Maya / Eva / Lucy / Sara / Nina
/ Amy / Kate / Vera / Alma / Hana / Ines / Leila / Priya / Yuki / Greta @he Ben / Tom / Sam / Max /
Leo / Paul / Omar / Finn / Jack / Noah / Adam / Carl / Emil / Felix / George / Henry / Ivan / Kofi /
Luis / Milo / Oscar / Ravi / Theo / Yusuf @kin_she grandmother / mother / aunt / big sister @kin_he
grandfather / father / uncle / big brother @job baker / gardener / librarian / painter / shepherd /
tailor / mail carrier @season spring / summer / autumn / winter @weather sunny / windy / cloudy /
rainy / foggy / snowy @sky_sunny the sun was bright / the sky was clear and blue / there was not a
cloud in the sky @sky_windy a strong wind was blowing / the wind was shaking the trees @sky_cloudy
gray clouds covered the sky / the clouds hung low @sky_rainy a soft rain was falling / rain was
dripping from the roofs @sky_foggy a thin fog lay over the fields / the hills were hidden in fog
@sky_snowy deep snow covered the ground / snow lay on every roof
@trait curious / cheerful / quiet / careful / lively / thoughtful / stubborn / clever / dreamy @home
in a {small|narrow|yellow} house {near the river|by the woods|at the end of a lane} / in two rooms
above {the post office|a shoe shop} @hobby collecting smooth stones / drawing maps / reading about
stars / making up songs / telling jokes / watching ants / asking questions
@open_name One [weather] [season] [time], [want]. / [Sky] one [season] [time] when [want]. / It was
a [season] [time], and [sky]. [Want]. @open_he There was once a <trait> [child] {named|called}
[name], who lived <home>. One [weather] [time] in [season], [want]. / [Name] was
{six|seven|eight|nine} years old and very <trait>. [Sky] one [season] [time] when [want]. / [Name]
lived <home>. [He] was a <trait> [child] who {liked|enjoyed} <hobby>. One [weather] [time], [want].
/ "What a [weather] [time]!" said [name], {looking out of the window|opening the door}. A little
later, [want]. / Years later, [name] still talked about that [weather] [time] in [season]. [He] was
a <trait> [child] then, and [want]. / Everyone in the {village|street|valley} knew [name], a <trait>
[child] with {a loud laugh|curly hair|long legs|round glasses}. On a [weather] [time] in [season],
[want].
@story <open_[form]> ~ <trouble> <tries> <mood> ~ <turn_[mode]> <fix> ~ <end> <thanks_[mode]>
<close_[span]> @tries First, [he] <try>. Then [he] <try>. / [Name] <try>. / [Name] did not give up
{so soon|easily}. [He] <try>. {Next|After that}, [he] <try>. / [He] <try>. Then [he] <try>. {Still
hopeful|At last}, [he] <try>. @mood [He] {sighed|frowned|shook [his] head} and {sat down|thought
hard|rubbed [his] nose}. / "This is {harder|more difficult} than I thought," [he] {said|whispered}.
/ {Nothing helped|It was no use}. / [He] almost {cried|gave up}.
@turn_help {Just then|A little later}, [helper] [came]. "{Can I help you|What is the matter}?" asked
[ally]. [Name] {explained everything|told [ho] the whole story}. <hint> / [Name] {ran|went} to find
[helper], who listened {carefully|quietly}. <hint> @hint "We could <advice>," said [ally]. / "Let us
<advice>," [hs] said {kindly|with a smile}. / "{Do not worry|I have an idea}," said [ally]. "We
{can|should} <advice>." / "Why not <advice>?" asked [ally]. @turn_alone [Name] {took a deep
breath|looked again, more carefully}. {Then|After a while,} an idea came. "I {could|will|should}
<advice>," [he] {said out loud|thought}. / "There must be a {better|smarter} way," [name]
{said|thought}. [He] {looked around|counted to ten|closed [his] eyes}. "What if I <advice>?"
@turn_truth {At last|In the end}, [name] went to [ally] and said {quietly|in a small voice},
"[confess] I am {very|so} sorry." [Ally] was silent for a moment. Then [hs] {said|answered}, "Thank
you for telling me. {We can put it right together|That took courage|Everybody makes mistakes}."
@turn_trade {At last|Finally}, [name] reached the {shop|stall} with [gift] in the window.
@thanks_help {[He] thanked [ally] {with a big smile|again and again}.|} @thanks_alone {[He] felt
very proud.|[He] could hardly believe it.|} @thanks_truth {[He] felt {light|glad} again.|}
@thanks_trade {} @close_days <lesson> @close_day <lesson> / <later_[time]> / <echo_[place]> /
<echo_[place]> <lesson>
@lesson {After that|From then on}, [name] {knew|remembered} that <[theme]>. / [Name] never forgot
that <[theme]>. / "Now I know that <[theme]>," said [name]. / And [name] had learned that <[theme]>.
@later_morning At {lunch|noon}, [name] told {the family|everyone} {about it|what had happened}. / It
was not yet noon, and [name] had already had {a small adventure|a day to remember}. @later_afternoon
That evening, [name] {told the story twice|drew a picture of it|fell asleep with a smile}. @echo_out
It was still [weather] when [name] {went|walked|ran} home, {tired but happy|humming a
tune|whistling}. @echo_home Outside, it was still [weather], {and|but inside,} [name] {hummed a
tune|smiled|drank a cup of warm milk}. @calm a calm {head|plan} is better than a strong arm /
thinking first saves a lot of work @patience good things take time / waiting is sometimes part of
the work @clever a simple idea can solve a hard problem @practice nobody is good at everything on
the first day / every mistake teaches something @brave fear grows smaller when you look at it @kind
helping feels better than winning @truth the truth is lighter to carry than a secret @trade a little
thing can grow into a big one @loss lost things are often very near @ware a ball of string / a
basket of apples / a jar of honey / a bag of wool / a new broom / a pair of boots / a warm blanket /
a box of nails / a brass lantern / a sack of flour / a wooden spoon / a straw hat
@description Have you ever {thought|wondered} about [many]? [One] is [what]. <facts> ~ <more>
<out_[group]> / [Name] {likes|knows a lot about} [many]. "[One] is [what]," [name] {often says|told
the class}. <facts> ~ <more> <out_[group]> / {Here is a riddle from [name]|[Name] asked [helper] a
riddle|This is the riddle that [name] likes best}: it <fact>. It <fact>, and it <fact>. What is it?
~ It is [one]! <facts> <out_[group]>
@facts It <fact>. [One] <fact>. {Besides|What is more}, it <fact>. / [One] <fact>, and it <fact>. It
<fact>. @more It <fact>, and it <fact>. / {There is more|And that is not all}: it <fact>, and it
<fact>. / [One] <fact>. It <fact>. @out_animal When you {meet|see} one, keep still and watch. /
Every animal has its own way to live, and this is the way of [one]. @out_tool It should be put back
in its place after work. / With a little practice, anyone can use one well. @out_food Many people
enjoy it {every day|all year long}. / Share it with a friend, and it tastes even better. @out_place
It is worth a visit, even on a gray day. / You could spend a whole afternoon there and not be bored.
@dialogue One [season] [time], [name] and [helper] were <doing>. «[opens]<start>» ~ <pair> <pair>
<pair> ~ <plan>^<wrap> / [Name] and [helper] were <doing>. «[opens]<start>» ~ <pair> <pair> ~ <pair>
<pair>^{For a moment, neither of them spoke.|} <plan>^<wrap> @doing sitting on a bench in the park /
washing the dishes / waiting for the bus / peeling potatoes / walking along the river / hanging up
the wash / carrying bags home from the market @beat smiled / nodded / laughed / looked up / thought
for a moment / turned around
@how_to Do you want to [goal]? It is {easy|not hard} if you {take your time|follow a few steps}. You
need [need]. ~ [steps] ~ <tip> <done> / Here is how to [goal]. {Get|Find} [need]. ~ [steps] <tip>
<done> / [Name] wanted to [goal] and asked [helper] for help. "You need [need]," said [ally]. This
is how [hs] explained it. ~ [steps] ~ <tip> <done> So [name] tried it, and it worked. @first First,
/ To begin, / First of all, @next Next, / Then / After that, / Now / When that is done, @last
Finally, / Last of all, / As the last step,
@everyday It was <day>, and [name], the [job], [woke]. <morning> [He] <am> and then <am>. [event] ~
[Sky] when [he] <lunch>. In the afternoon, [he] <pm>. {Later|After that}, [he] <pm>. ~ <evening>
[later] <night> / [Name] was a [job] who [woke] on <day>. <morning> {Before noon|In the morning},
[he] <am>. After that, [he] <am>. ~ [event] {At noon|At lunchtime}, [name] <lunch>, and later [he]
<pm>. ~ <evening> [later] <night>
@day Monday / Tuesday / Wednesday / Thursday / Friday / Saturday @woke woke up at {five|six|seven} /
woke up before the alarm rang / got up when the rooster crowed @morning [He] washed, dressed, and
ate {toast with jam|warm porridge}. / For breakfast, [he] had {an orange|two pancakes} and a cup of
{tea|coffee|cocoa}. @lunch ate {noodles|a cheese sandwich|rice and fish} / shared {a pie|a
melon|some nuts} with a friend @evening In the evening, [he] cooked {soup|mushrooms|lentils} and
{read the newspaper|listened to the radio}. / At home, [he] took off [his] shoes and {called an old
friend|played the guitar|watered the plants}. @night [Name] {yawned|put out the light}, and soon
[he] was asleep. / "A {good|busy|full} day," thought [name], and [he] {went to bed|fell asleep at
once}.
@letter Dear [ally],# <hello> <first> <news> <news> ~ <news> {<news>|} <ask> <bye># {Your
friend|With love|Best wishes|Yours truly},^[name] @hello Thank you for your {kind|long|funny}
letter. {It made me laugh.|I read it twice.} / I hope you are well. / It has been a long time since
my last letter. / How are you? I am {fine|very well|happy}. @bye Please write back soon. / I hope to
see you soon. / Say hello to your {family|sister|parents} from me. / I miss you. / Now I must stop,
because {dinner is ready|it is late|my hand is tired}.
""")[0][1]

STORIES = _records("""
= $look {red|yellow|striped|paper} $tool {rake|pole|broom} $weather windy $theme calm @want [subj]
took {a|[his] new} [look] kite to the {wide field|high hill} behind the {church|mill} @trouble The
kite rose quickly, but a sudden gust threw it into the top of a tall {oak|pine|maple}. @try pulled
the string, but the knot only got tighter / shook the trunk, but nothing fell except two dry twigs /
threw a stick at the branch and missed / jumped, but the branch was much too far up @advice lift it
down with a long [tool] @fix [Doers] found a long [tool], reached up, and pushed. The kite slid free
and {floated|dropped} to the ground. @end Soon it was {dancing|sailing} in the wind again.
= $load {pumpkins|apples|potatoes|turnips} $season autumn $weather {sunny|cloudy|windy} $theme
clever @want [subj] pulled {a heavy|an old|a creaking} wagon full of [load] {along the lane|to
market} @trouble {With a loud crack|Suddenly}, one wheel came off, and the [load] rolled into the
grass. @try pushed the wheel back on, but it fell off again at once / tried to pull the wagon on
three wheels, but it tipped over / tied the wheel on with a scarf, but the scarf slipped @advice
make a new pin for the wheel from a strong stick @fix [Doers] cut a strong stick, pushed it through
the axle, and tapped it with a stone. Now the wheel stayed on. @end The wagon rolled on, and not one
of the [load] was {lost|left behind}.
= $water {river|canal|lake} $season spring $weather {sunny|rainy|cloudy} $theme kind @want [subj]
{was walking|went for a walk} beside the [water] @trouble A {tiny|yellow|fluffy} duckling sat alone
{in the grass|under a bush} and cried for its mother. @try called across the water, but no duck
answered / offered it some crumbs, but it was too frightened to eat / set it on the water, but it
swam straight back @advice carry it along the bank and listen for ducks @fix [Doers] put the
duckling in a hat and walked along the bank. Behind {the bridge|the reeds} there was loud quacking.
It was the mother duck with {four|five|six} more ducklings. @end The duckling jumped into the
[water] and swam to its family without looking back.
= $look {red|shiny|rusty} $season {spring|summer} $weather {sunny|cloudy} $theme practice @want
[subj] wanted to learn to ride a [look] bicycle in the quiet street behind the station @trouble It
looked easy when other people did it, but the bicycle shook like a {nervous|wild} goat. @try rolled
a few feet and landed in a hedge / looked down at the pedals and steered into a fence / went so
slowly that the bicycle just tipped over @advice practice looking far ahead @fix [Name] looked at
the {chimney|big tree} at the end of the street and turned the pedals steadily. The wheels stopped
shaking. [He] was riding! @end By the tenth ride, [he] could even {ring the bell|wave} on the way.
= $jar {jam|pears|pickles|plums} $near home $weather {rainy|windy|foggy|cloudy} $theme brave @want
[subj] was sent to the dark cellar for a jar of [jar] @trouble Halfway down the stairs, [he] heard
{a strange noise|something move in the dark}. @try took one more step and stopped / sang a loud
song, but the noise went on / ran back up and counted to {ten|twenty}, but the noise was still there
@advice take a lamp and find out what it is @fix [Doers] lit a lamp and went down step by step. {A
mouse was pushing a nut across the floor|Water was dripping into an empty can|A branch was knocking
on the little window}. That was all! @end [Name] laughed and carried the [jar] upstairs like a
{prize|treasure}.
= $plant {sunflower|bean|pea} $near home $season spring $weather {sunny|cloudy|rainy} $span days
$theme patience @want [subj] planted a [plant] seed in a {clay|blue|cracked} pot @trouble {A
week|Day after day} {went by|passed}, and nothing came up. @try gave the seed so much water that the
soil turned to mud / talked to the pot kindly, but the soil was silent / dug up the seed to look and
had to bury it again @advice put the pot in a sunny place and leave it alone @fix [Name] put the pot
on a bright windowsill, gave it a little water every day, and waited. Then, one morning, a green tip
pushed up into the light. @end By the end of summer, the plant was taller than [name].
= $fur {gray|black|spotted|white} $weather {sunny|cloudy|windy} $theme calm @want [subj] was
{stacking wood|washing the windows} @trouble A thin cry came from above. A [fur] kitten sat on the
roof of the shed and was afraid to come down. @try called it softly, but it only cried louder / held
up both arms, but the kitten would not jump / leaned a board against the wall, but it was too steep
@advice put some fish in a basket and lift it up to the roof @fix [Doers] put a piece of fish in a
basket, tied it to a pole, and lifted it to the edge of the roof. The kitten stepped in and rode
down like a {queen|passenger}. @end It ate the fish and fell asleep on [name]'s {lap|coat}.
= $thing {whistle|ring|medal|key} $look {silver|lucky|shiny} $near home $weather
{rainy|snowy|cloudy|foggy} $theme loss @want [subj] was {tidying up|dusting the shelves|getting
dressed} @trouble Suddenly [his] [look] [thing] was gone. {It was a present from an old friend|[He]
had promised to take care of it}. @try looked under the bed, but found only a dusty sock / searched
behind the sofa, but there were only two old coins / emptied the laundry basket and found nothing
but towels / opened every drawer, but saw only spoons, candles, and string @advice stop and remember
where it was last @fix [Doers] went back through the whole [time], step by step, and there it was,
{inside [his] left boot|between two cushions|under the sleeping cat|in the pocket of an apron}. @end
[He] tied the [thing] to a ribbon and wore it around [his] neck.
= $near home $weather {rainy|cloudy|windy|foggy} $theme truth $mode truth $confess I broke your
vase. @want [subj] was {dancing|playing ball|chasing the cat} in the {kitchen|hall} @trouble Crash!
[He] bumped into the table, and a {blue|tall|painted} vase fell and broke into {three|five|seven}
pieces. @tries [He] was afraid and {pushed the pieces under the rug|hid the pieces in a drawer}. But
the secret felt {heavy|like a stone}, and {no game was fun|the food had no taste} anymore. @mood {}
@fix [Doers] glued the pieces together, one by one. @end The vase had lines like a map, but it stood
up again.
= $theme trade $mode trade $span days $season {spring|summer|autumn} $weather {sunny|cloudy|windy}
$kin <kin_she> $a <ware> $b <ware> $c <ware> $gift {a music box|a blue teapot|a painted fan|a pair
of red slippers} @want [subj] wanted to get [gift] for [his] [kin]'s birthday @trouble But [he] had
no money. All [he] had was [a]. @tries {On the bridge|Near the well}, [he] met a {sailor|miller}. "I
need [a]," said the stranger. "I can give you [b] for it." [Name] agreed. {Then|Next} came a
{soldier|dancer} who had {dreamed of|long looked for} [b] and gave [him] [c]. @mood {} @fix "[C]!"
cried the owner. "That is just what I need." And so the last trade was made. @end [His] [kin]
{laughed with joy|was speechless}, and the best part of the present was the story.
""")

DESCRIPTIONS = _records("""
= $group animal $one a owl $many owls $what a bird with soft feathers and round eyes @fact usually
hunts mice at night / can turn its head almost all the way around / flies without a sound / sees
very well in weak light / swallows small animals whole / sleeps in a hollow tree or an old barn
= $group animal $one a hedgehog $many hedgehogs $what a small animal with thousands of spines @fact
rolls up into a ball when it is afraid / eats beetles, worms, and snails / sleeps through the winter
under a pile of leaves / comes out after dark / hears and smells very well / grunts like a tiny pig
= $group tool $one a hammer $many hammers $what a tool with a heavy head and a handle @fact drives
nails into wood / makes a loud noise / works best when you hold it near the end of the handle / is
usually made of steel and wood / can be dangerous for a thumb / is useful on every building site
= $group food $one bread $many bread $what a food made from flour, water, and salt @fact often rises
because of yeast / has a crust outside and a soft middle / is baked in a hot oven / tastes best when
it is fresh / becomes dry after a few days / goes well with butter, cheese, or soup
= $group food $one a apple $many apples $what a round fruit with a core @fact grows on a tree / may
be red, green, or yellow / can taste sweet or sour / is ripe in late summer or autumn / turns brown
where it is cut / keeps for months in a cool cellar
= $group place $one a lighthouse $many lighthouses $what a tower with a bright lamp at the top @fact
stands on the coast, often on a rock / warns sailors about dangerous places / can be seen from far
away / has many stairs inside / is often painted in two colors / shines at night and in fog
= $group place $one a market $many markets $what a place where people buy and sell @fact is full of
stalls and voices / sells fruit, vegetables, flowers, and fish / is often held in a square / begins
early in the morning / brings farmers and cooks together / smells of spices and bread
""")

DIALOGUES = _records("""
= $asks a $opens b @start The moon looks {thin|different|pale} this week. @pair Why does it change
its shape? > It does not really change. The sun lights one half of it, and we see more or less of
that half. / How far away is it? > Very far. Even a fast car would need months to get there. / Does
anybody live there? > No, there is no air to breathe. A few people have walked on it, though. / Is
it bigger than the sun? > No, it is much smaller. It only looks big because the sun is so far away.
@plan Can we look at it together tonight? > Yes, if the sky is clear. @wrap That night the moon
shone on the roofs, and two people {waved|looked up} at it.
= $asks b $opens a $near friend @start Our new {puppy|dog} still has no name. @pair What color is
it? > Brown, with one white {ear|paw}. / Does it bark a lot? > Only at the mailbox, and nobody knows
why. / What does it like best? > It likes to roll in mud and to sleep on my shoes. / How about
Button? > That is sweet, but it is too soft for such a loud dog. / Is it clever? > It can open the
kitchen door. @plan Then how about {Biscuit|Captain|Pepper|Thunder}? > That is perfect! @wrap From
that day on, the {dog had a name|mailbox had a famous enemy}.
= $asks a $opens b @start This year we could grow something {to eat|in a box}. @pair What grows
fast? > Radishes do. You can eat them after about a month. / Do they need sun? > Yes, but they do
not like dry soil. / How deep do I plant the seeds? > Only as deep as the tip of your finger. / What
if snails come? > We pick them up in the evening and carry them to the hedge. @plan Will you help me
dig? > Of course. I will bring two {spades|shovels} on Saturday. @wrap On Saturday they dug until
their {hands were black|backs hurt}, and then they planted the first row.
= $asks b $opens a $near friend @start I start at a new school {tomorrow|on Monday}. @pair Are you
nervous? > A little. I do not know anyone there. / How will you get there? > By bus, because it is
too far to walk. / What will you take with you? > A notebook, two pencils, and a sandwich. / What
are you looking forward to? > The library. They have a whole room of comics. @plan Shall I go to the
bus stop with you? > Yes, please. That would make it easier. @wrap After that, the new school seemed
{a little nearer|less strange}.
""")

HOW_TOS = _records("""
= $goal boil an egg $need an egg, a small pot, and a spoon @step fill the pot with enough water to
cover the egg / bring the water to a boil / lower the egg into the water with the spoon / ?turn down
the heat a little / wait for {eight|nine|ten} minutes / lift the egg out and put it in cold water /
?tap it all around / peel off the shell @tip Be careful with the hot water. @done {Eat|Serve} the
egg with a little salt.
= $goal plant a tree $need a young tree, a spade, and a bucket of water @step choose a place with
enough light / dig a hole twice as wide as the roots / ?take out big stones / set the tree in the
middle / ?ask someone to hold it straight / fill the hole with soil / press the soil down with your
feet / pour the water around the trunk @tip A young tree is thirsty, so water it often. @done In a
few years you can sit in its shade.
= $goal send a letter $need paper, a pen, an envelope, and a stamp @step write the date at the top
of the page / ?think about your news / write what you want to say / sign your name / fold the page
and put it in the envelope / close the envelope / write the address on the front / put the stamp in
the corner / ?check the address / drop it in the mailbox @tip Write clearly, so that the mail
carrier can read it. @done Now you only have to wait for an answer.
= $goal build a sand castle $need a bucket, a shovel, and a lot of sand @step find a flat place near
the water / ?mark a big circle with a stick / dig until the sand is {wet|damp} / fill the bucket
with wet sand / press it down firmly / turn the bucket over and lift it slowly / build more towers
in the same way / ?put shells on the walls / dig a ditch around it @tip Dry sand does not hold
together. @done When the tide comes in, wave goodbye to your castle.
""")

EVERYDAYS = _records("""
= $job baker $woke got up long before sunrise @am mixed flour and water in a huge bowl / shaped
forty round loaves / filled the window with rolls @pm sold the last buns / swept the floor / counted
the coins
= $job farmer $woke <woke> @am milked the cows / fed the chickens / collected eggs / counted the
sheep @pm mended a fence / drove the tractor to the barn / sorted potatoes / stacked bales of hay
= $job bus driver $woke <woke> @am drove children to school / sold a ticket to a tourist / cleaned
the mirrors @pm drove across the bridge twice / helped a woman with a stroller / parked the bus
= $job teacher $woke <woke> @am read a story to the class / drew a map on the board / explained
fractions with a pie @pm corrected a pile of tests / practiced a song with the choir / showed the
class a fossil
""")
EVENTS = _records("""
= $event Around ten, a button fell off [his] shirt. $later Before bed, [he] sewed the button back
on.
= $event A {stray|thin} cat followed [him] for a while. $later The cat was waiting at the door, so
it got some milk.
= $event A neighbor gave [him] a bag of pears. $later Then [he] made jam from the pears.
""")

LETTERS = _records("""
= @first I am writing to you from {a small town by the sea|an island}. @news Yesterday I found {a
starfish|a shell as big as my hand}. / We sleep in a room with a view of the harbor. / The waves are
high, and I have learned to float. / A gull stole my {sandwich|biscuit}, and everybody laughed. /
The fishermen let me hold a crab. @ask Have you ever slept so close to the sea?
= @first We have moved to {a new town|another street}, and I must tell you everything. @news My room
has a round window, and I can see a tower from it. / Half of our plates are still in boxes. / On the
first night I could not sleep, because the house makes strange noises. / I got lost on the way to
the bakery, but a kind woman helped me. / There is a pear tree in the yard. @ask When will you visit
us?
= @first I was ill, but I am better now. @news For a week I stayed in bed and drank tea. / My voice
was so low that I sounded like a bear. / My grandmother read me a long book about pirates. / I did a
puzzle with a thousand pieces, and only one was missing. / The doctor was friendly and had cold
hands. @ask Is everyone healthy at your house?
""")
TABLES = {"story": STORIES, "description": DESCRIPTIONS, "dialogue": DIALOGUES}
TABLES |= {"how_to": HOW_TOS, "everyday": EVERYDAYS, "letter": LETTERS}
SHORT_FORMS = {r"(?i)\b(do|does|did|was|is|could|should) not\b": r"\1n't", r"\bcannot\b": "can't"}
SHORT_FORMS |= {r"\bI am(?= \w)": "I'm", r"\bI will(?= \w)": "I'll", r"\b([Ll]et) us\b": r"\1's"}


def _case(key: str, text: str) -> str:
    """Give the text a capital when the key has one."""
    return text[:1].upper() + text[1:] if key[0].isupper() else text


class _Teller:
    """Tells one document: draws from the rules and remembers the facts."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.facts: dict[str, str] = {}
        self.rules = dict(RULES)
        self.piles: dict[str, list[str]] = {}

    def bind(self, **facts: str) -> None:
        """Fix facts, one after another, for the rest of the document."""
        for key, template in facts.items():
            self.facts[key] = self.say(template)

    def use(self, record: _Record) -> None:
        """Take over the rules and facts of a record; ``q > a`` becomes a spoken exchange."""
        facts, rules = record
        frame = "^«a{}»^«B{}»" if facts.get("asks") == "a" else "^«b{}»^«A{}»"
        for rule, items in rules.items():
            self.rules[rule] = [frame.format(*i.split(" > ")) if " > " in i else i for i in items]
        self.bind(**facts)

    def draw(self, rule: str) -> str:
        """The next alternative of a rule, none twice before all came once."""
        if not self.piles.get(rule):
            self.piles[rule] = self.rng.sample(self.rules[rule], len(self.rules[rule]))
        return self.piles[rule].pop()

    def say(self, text: str) -> str:
        """Expand choices, facts, and rules."""
        while "{" in text:
            text = re.sub(r"\{([^{}]*)\}", lambda m: self.rng.choice(m[1].split("|")), text)
        text = re.sub(r"\[(\w+)\]", lambda m: _case(m[1], self.facts[m[1].lower()]), text)
        return re.sub(r"<(\w+)>", lambda m: _case(m[1], self.say(self.draw(m[1].lower()))), text)

    def speech(self, mark: str, text: str) -> str:
        """Put a line into quotation marks and say who speaks; a capital mark is an answer."""
        facts = self.facts
        who, pronoun = ("name", "he") if mark in "aA" else ("ally", "hs")
        if self.rng.random() < 0.25:
            return f'{_case("A", facts[who])} {self.draw("beat")}. "{text}"'
        first, rest = re.match(r"(.*?[.?!])(?: (.*))?$", text).groups("")
        verb = self.rng.choice(("said", "answered", "replied")) if mark.isupper() else "said"
        verb = "asked" if first.endswith("?") else verb
        who, known = facts[who], facts[pronoun if facts["hs"] != facts["ally"] else who]
        tag = self.rng.choice((f"{verb} {who}", f"{who} {verb}", f"{known} {verb}"))
        first = first[:-1] + "," if first.endswith(".") else first
        return f'"{first}" {tag}.' + (f' "{rest}"' if rest else "")

    def finish(self, text: str) -> str:
        """Set speech, short forms, articles, and paragraphs."""
        text = re.sub(r"«(\w)(.*?)»", lambda m: self.speech(m[1], _case("A", m[2])), text)
        if self.rng.random() < 0.35:
            for pattern, short in SHORT_FORMS.items():
                text = re.sub(pattern, short, text)
        text = re.sub(r"\b([Aa]) (?!one\b|uni|use)(?=[aeiou])", r"\1n ", text)
        text = re.sub(r" *~ *", lambda _: self.rng.choice(("\n\n", " ")), text)
        text = re.sub(r"\s*#\s*", "\n\n", text)
        text = re.sub(r"[ ^]*\^[ ^]*", "\n", text)
        return re.sub(r"\n{3,}", "\n\n", re.sub(r" {2,}", " ", text)).strip()


def _cast(t: _Teller, near: str) -> None:
    """Choose the hero and somebody else; he and she are used only where they are clear."""
    sex, other = t.rng.choices(("she", "he"), k=2)
    he, him, his, child = PRONOUNS[sex]
    role = t.rng.choice(HELPERS.get(near, (near,)))
    ally = {"kin": f"[his] <kin_{other}>", "friend": f"<{other}>", "job": "the <job>"}[role]
    helper = {"kin": "[ally]", "friend": "[his] friend [ally]", "job": "[ally] from next door"}
    t.bind(name=f"<{sex}>", he=he, him=him, his=his, child=child, ally=ally, helper=helper[role])
    hs, ho = PRONOUNS[other][:2] if sex != other else ("[ally]", "[ally]")
    t.bind(hs=hs, ho=ho, came="came in" if near == "home" else "{came by|walked past}", place=near)


def _steps(t: _Teller) -> str:
    """Tell steps in their order; one with a question mark in front may be left out."""
    steps = [s.lstrip("?") for s in t.rules["step"] if s[0] != "?" or t.rng.random() < 0.5]
    links = ["<first> ", *["{<next> |<next> |}"] * (len(steps) - 2), "<last> "]
    told = [t.say(link + step) for link, step in zip(links, steps, strict=True)]
    return " ".join(_case("A", each) + "." for each in told)


def _write(t: _Teller, kind: str) -> str:
    """Plan and tell one document of a kind."""
    record = t.rng.choice(TABLES[kind])
    near = {"dialogue": "talk", "letter": "friend"}.get(kind, "out")
    _cast(t, record[0].get("near", near))
    t.bind(season="<season>", weather="<weather>", time="{morning|afternoon}")
    t.bind(span="day", mode="{help|help|alone}")
    t.use(t.rng.choice(EVENTS))
    t.use(record)
    t.bind(season="winter" if t.facts["weather"] == "snowy" else "[season]")
    t.bind(sky="<sky_[weather]>")
    if kind == "story":
        alone = t.facts["mode"] == "alone"
        t.bind(doers="[name]" if alone else "{[name] and [ally]|the two of them}")
        t.bind(form="{name|he|he}")
        t.bind(subj="[name]" if t.facts["form"] == "name" else "[he]", want="<want>")
    elif kind == "how_to":
        t.bind(steps=_steps(t))
    return t.finish(t.say(f"<{kind}>"))


def compose(rng: random.Random, kinds: str | Sequence[str] | None = None) -> tuple[str, str]:
    """Return the kind and the text of one document; see `document`."""
    names = [kinds] if isinstance(kinds, str) else list(TABLES if kinds is None else kinds)
    wrong = [repr(each) for each in names if each not in TABLES] or ([] if names else ["(none)"])
    if wrong:
        raise ValueError(f"Unknown kind {wrong[0]}; the valid kinds are {', '.join(TABLES)}.")
    kind = rng.choices(names, [5 if each == "story" else 2 for each in names])[0]
    while True:
        text = _write(_Teller(rng), kind)
        if MIN_WORDS <= len(text.split()) <= MAX_WORDS:
            return kind, text


def document(rng: random.Random, kinds: str | Sequence[str] | None = None) -> str:
    """Return one document of 60 to 220 words; `kinds` is one name or several out of `TABLES`."""
    return compose(rng, kinds)[1]


def statistics(rows: Sequence[tuple[str, str]]) -> str:
    """Return a table about (kind, text) rows: sizes, and how varied the texts are."""
    texts = [text for _, text in rows]
    words = {word for text in texts for word in re.findall(r"[a-z']+", text.lower())}
    sentences = [each for text in texts for each in re.split(r'(?<=[.?!])"?\s+', text)]
    lines = [f"{'kind':<12}{'documents':>10}{'mean words':>12}"]
    for kind in TABLES:
        sizes = [len(text.split()) for each, text in rows if each == kind]
        lines.append(f"{kind:<12}{len(sizes):>10}{sum(sizes) / max(1, len(sizes)):>12.1f}")
    lines.append(f"distinct documents: {len(set(texts))} of {len(texts)}")
    lines.append(f"distinct words: {len(words)}")
    share = len(set(sentences)) / max(1, len(sentences))
    return "\n".join([*lines, f"distinct sentences: {share:.1%} of {len(sentences)}"])


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: print documents, write them, or print statistics."""
    parser = argparse.ArgumentParser(description="Simple English prose from a small grammar.")
    parser.add_argument("--count", type=int, default=3, help="how many documents (3)")
    parser.add_argument("--kind", help=f"only this kind: {', '.join(TABLES)}")
    parser.add_argument("--seed", type=int, default=42, help="seed of the random source (42)")
    parser.add_argument("--out", type=Path, help="write JSON lines to this file")
    parser.add_argument("--stats", action="store_true", help=f"a table over {STATS_DOCUMENTS}")
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    try:
        count = STATS_DOCUMENTS if args.stats else args.count
        if count < 1:
            raise ValueError("--count must be at least 1.")
        rows = [compose(rng, args.kind) for _ in range(count)]
        if args.out:
            write_json_lines(args.out, ({"text": t, "kind": k} for k, t in rows))
    except (ValueError, OSError) as error:
        print(f"generate_prose.py: {error}", file=sys.stderr)
        return 2
    if args.stats:
        print(statistics(rows))
    elif not args.out:
        print(f"\n\n{'-' * 60}\n\n".join(text for _, text in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

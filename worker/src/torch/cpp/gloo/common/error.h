// Stand-in for a gloo header that the torch wheel does not ship: nothing of it is used.
#pragma once

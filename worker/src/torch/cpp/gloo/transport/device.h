// Stand-in for a gloo header that the torch wheel does not ship: devices are only held in a shared_ptr.
#pragma once

namespace gloo::transport {
class Device;
class UnboundBuffer;
}

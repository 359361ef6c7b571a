//! Who is at the other end of a connection: its address and, where it showed one, its certificate.

use std::net::SocketAddr;

/// The other end of a connection; a listener's address, for `axum::serve`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Its address.
    pub address: SocketAddr,
    /// sha256 of the certificate (DER) that it proved to have the key of; whose it is, is for [`crate::control::Control`] to say.
    pub certificate: Option<[u8; 32]>,
}

//! Names in a peer's directory: the beginning of a transfer, which is then declined.

use crate::{Packet, PacketStream};
use futures::StreamExt as _;
use shipway_fault::{Fault, Result};
use shipway_proto::fsutil::types::packet::PacketType;

/// The paths that the peer announces, at most `limit` of them; no file is asked for.
pub async fn announced(stream: PacketStream, limit: usize) -> Result<Vec<String>> {
    let PacketStream { mut incoming, outgoing } = stream;
    let mut names = Vec::new();
    while let Some(packet) = incoming.next().await {
        let packet = packet?;
        match PacketType::try_from(packet.r#type) {
            Ok(PacketType::PacketStat) => match packet.stat {
                Some(stat) if names.len() < limit => names.push(stat.path),
                // The empty one ends the list; past the limit the rest does not matter.
                _ => break,
            },
            Ok(PacketType::PacketErr) => {
                return Err(Fault::unknown(String::from_utf8_lossy(&packet.data).into_owned()));
            }
            _ => break,
        }
    }
    let last = Packet { r#type: PacketType::PacketFin.into(), ..Default::default() };
    let _ = outgoing.send(last).await;
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Stat;

    #[tokio::test]
    async fn names_come_without_files() {
        let (ours, theirs) = PacketStream::pair();
        let PacketStream { mut incoming, outgoing } = theirs;
        for path in ["a", "b", ""] {
            let stat = (!path.is_empty()).then(|| Stat { path: path.into(), ..Default::default() });
            let packet =
                Packet { r#type: PacketType::PacketStat.into(), stat, ..Default::default() };
            outgoing.send(packet).await.expect("sent");
        }
        assert_eq!(announced(ours, 10).await.expect("names"), ["a", "b"]);
        let last = incoming.next().await.expect("a packet").expect("sound");
        assert_eq!(last.r#type, i32::from(PacketType::PacketFin));
    }
}

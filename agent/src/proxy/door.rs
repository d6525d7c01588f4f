//! What the agent says to a proxy process at its door: take your clients back; do you serve?
//!
//! Invariant: an answer is waited for so long and no longer, and what it says is no proof: who serves
//! stands in proxy.json. It is a reason not to end a process when that can't be written.

use std::{io, path::Path, time::Duration};

use prost::Message as _;
use slotmesh_proto::handover::v1 as pb;
use slotmesh_runtime::socket::short_path;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    time::timeout,
};

/// The spare ends its own conversation in 5 s and takes back in 30 s, or says that it did not.
const ANSWER_LIMIT: Duration = Duration::from_secs(40);
/// A process that serves answers a question at once, also when its disk does not.
const INQUIRY_LIMIT: Duration = Duration::from_secs(2);
/// Of the one message that is expected.
const ANSWER_BYTES_MAX: u32 = 64 * 1024;

/// Asks the spare behind `door` to serve again, and waits until every client has come who can, 40 s at
/// most.
///
/// # Errors
/// Why it did not, for the operator.
pub(super) async fn take_back(door: &Path) -> Result<(), String> {
    let told =
        |error: io::Error| format!("ask the process of before at {}: {error}", door.display());
    match timeout(ANSWER_LIMIT, ask_back(door)).await {
        Ok(Ok(problem)) if problem.is_empty() => Ok(()),
        Ok(Ok(problem)) => Err(format!(
            "the process of before does not serve again: {problem}"
        )),
        Ok(Err(error)) => Err(told(error)),
        Err(_) => Err(told(io::ErrorKind::TimedOut.into())),
    }
}

/// The process behind `door`, if it says that it serves this proxy's clients.
pub(super) async fn who_serves(door: &Path, proxy_id: &str, instance_id: &str) -> Option<u32> {
    let inquiry = pb::to_giver::Message::Inquire(pb::Ask {
        // Nothing is handed over: whatever it speaks.
        version_min: 1,
        version_max: u32::MAX,
        proxy_id: proxy_id.to_owned(),
        instance_id: instance_id.to_owned(),
        release: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        ..pb::Ask::default()
    });
    match timeout(INQUIRY_LIMIT, converse(door, inquiry)).await {
        Ok(Ok(Some(pb::to_taker::Message::Offer(offer)))) => Some(offer.pid),
        _ => None,
    }
}

async fn ask_back(door: &Path) -> io::Result<String> {
    let ask = pb::to_giver::Message::TakeBack(pb::TakeBack {});
    match converse(door, ask).await? {
        Some(pb::to_taker::Message::TakenBack(answer)) => Ok(answer.problem),
        _ => Err(io::Error::other("it answered something else")),
    }
}

async fn converse(
    door: &Path,
    ask: pb::to_giver::Message,
) -> io::Result<Option<pb::to_taker::Message>> {
    let (_dir, short) = short_path(door)?;
    let mut stream = UnixStream::connect(short).await?;
    let ask = pb::ToGiver { message: Some(ask) };
    let body = ask.encode_to_vec();
    let length = u32::try_from(body.len()).map_err(io::Error::other)?;
    stream.write_all(&length.to_be_bytes()).await?;
    stream.write_all(&body).await?;
    let length = stream.read_u32().await?;
    if length > ANSWER_BYTES_MAX {
        return Err(io::Error::other("its answer is too long"));
    }
    let mut body = vec![0; length as usize];
    stream.read_exact(&mut body).await?;
    let answer = pb::ToTaker::decode(&body[..]).map_err(io::Error::other)?;
    Ok(answer.message)
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixListener;

    use super::*;

    /// What is made of this answer, and what was asked.
    async fn told(answer: pb::to_taker::Message) -> (Option<u32>, pb::Ask) {
        let dir = tempfile::tempdir().unwrap();
        let door = dir.path().join("door.sock");
        let listener = UnixListener::bind(&door).unwrap();
        let process = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let length = stream.read_u32().await.unwrap();
            let mut body = vec![0; length as usize];
            stream.read_exact(&mut body).await.unwrap();
            let answer = pb::ToTaker {
                message: Some(answer),
            };
            let answer = answer.encode_to_vec();
            let length = u32::try_from(answer.len()).unwrap();
            stream.write_u32(length).await.unwrap();
            stream.write_all(&answer).await.unwrap();
            match pb::ToGiver::decode(&body[..]).unwrap().message {
                Some(pb::to_giver::Message::Inquire(ask)) => ask,
                other => panic!("{other:?}"),
            }
        });
        let serves = who_serves(&door, "p-1", "r-1").await;
        (serves, process.await.unwrap())
    }

    #[tokio::test]
    async fn only_a_process_that_offers_its_clients_serves() {
        let offer = pb::Offer {
            pid: 7,
            ..pb::Offer::default()
        };
        let (serves, ask) = told(pb::to_taker::Message::Offer(offer)).await;
        assert_eq!(serves, Some(7));
        assert_eq!((&*ask.proxy_id, &*ask.instance_id), ("p-1", "r-1"));
        let refused = pb::Refused::default();
        let (serves, _) = told(pb::to_taker::Message::Refused(refused)).await;
        assert_eq!(serves, None);
        let nowhere = Path::new("/nowhere/door.sock");
        assert_eq!(who_serves(nowhere, "p-1", "r-1").await, None);
    }
}

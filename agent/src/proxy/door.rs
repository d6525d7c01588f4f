//! What the agent says to a proxy process at its door: take your clients back.
//!
//! Invariant: an answer is waited for so long and no longer, and what it says is no proof: who serves
//! stands in proxy.json.

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
    match timeout(ANSWER_LIMIT, converse(door)).await {
        Ok(Ok(problem)) if problem.is_empty() => Ok(()),
        Ok(Ok(problem)) => Err(format!(
            "the process of before does not serve again: {problem}"
        )),
        Ok(Err(error)) => Err(told(error)),
        Err(_) => Err(told(io::ErrorKind::TimedOut.into())),
    }
}

async fn converse(door: &Path) -> io::Result<String> {
    let (_dir, short) = short_path(door)?;
    let mut stream = UnixStream::connect(short).await?;
    let ask = pb::ToGiver {
        message: Some(pb::to_giver::Message::TakeBack(pb::TakeBack {})),
    };
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
    match answer.message {
        Some(pb::to_taker::Message::TakenBack(answer)) => Ok(answer.problem),
        _ => Err(io::Error::other("it answered something else")),
    }
}

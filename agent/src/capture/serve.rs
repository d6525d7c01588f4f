//! Gives a file of lost writes to whoever asks for it by its name.
//!
//! Invariant: only plain files directly in the directory of lost writes are ever opened.

use std::path::Path;

use slotmesh_proto::agent::v1::ReadLostWritesResponse;
use tokio::{io::AsyncReadExt, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::is_name;

/// Well below the longest message of gRPC.
const CHUNK_BYTES: usize = 256 << 10;
/// A reader that is slow holds up only its own stream.
const CHUNKS_WAITING_MAX: usize = 4;

/// The chunks of a file, in order.
pub type Chunks = ReceiverStream<Result<ReadLostWritesResponse, Status>>;

/// Opens a file; it is read as fast as its reader takes it.
pub async fn read(dir: &Path, name: &str) -> Result<Chunks, Status> {
    if !is_name(name) {
        return Err(Status::invalid_argument("file: no name of lost writes"));
    }
    let path = dir.join(name);
    let is_plain = tokio::fs::symlink_metadata(&path)
        .await
        .is_ok_and(|meta| meta.is_file());
    if !is_plain {
        return Err(Status::not_found(
            "the file is not kept here any more: somebody has deleted it",
        ));
    }
    let mut file = tokio::fs::File::open(&path)
        .await
        .map_err(|error| Status::internal(format!("open {name}: {error}")))?;
    let (sender, receiver) = mpsc::channel(CHUNKS_WAITING_MAX);
    tokio::spawn(async move {
        loop {
            let mut chunk = vec![0; CHUNK_BYTES];
            let item = match file.read(&mut chunk).await {
                Ok(0) => return,
                Ok(count) => {
                    chunk.truncate(count);
                    Ok(ReadLostWritesResponse { chunk })
                }
                Err(error) => Err(Status::internal(format!("read: {error}"))),
            };
            let is_last = item.is_err();
            if sender.send(item).await.is_err() || is_last {
                return;
            }
        }
    });
    Ok(ReceiverStream::new(receiver))
}

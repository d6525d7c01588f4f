//! Client tokens: a request that is repeated with its token gets the answer of the first one.
//!
//! Invariant: the record of a token is written in the transaction that does what was asked, so it is
//! there exactly when that happened.

use slotmesh_proto::store::v1 as records;
use slotmesh_task::admit::{self, RefusalKind};
use tonic::Status;

use super::{Context, refuse, refused, store_failed};
use crate::{
    clock,
    leader::LeaderTxn,
    store::keys::{self, Key},
};

/// A token with the request that it stands for.
#[derive(Clone, Debug)]
pub(crate) struct Token {
    /// Empty: the caller gave none.
    key: Option<String>,
    fingerprint: Vec<u8>,
}

impl Token {
    /// A checked token; `body` is the request without it.
    ///
    /// # Errors
    /// When it is too long or not ASCII.
    #[allow(clippy::result_large_err)]
    pub(crate) fn of(text: &str, method: &str, body: &[u8]) -> Result<Self, Status> {
        admit::client_token(text).map_err(|r| refused(&r))?;
        // Tokens are the caller's words; keys have a narrower alphabet.
        let id = || hex::encode(admit::fingerprint("token", text.as_bytes()));
        let key = (!text.is_empty()).then(|| Key::Idempotency { token: &id() }.to_string());
        Ok(Self {
            key,
            fingerprint: admit::fingerprint(method, body),
        })
    }

    /// What an earlier request with this token led to.
    ///
    /// # Errors
    /// When it was another request, or the store does not answer.
    pub(crate) async fn earlier(
        &self,
        context: &Context,
    ) -> Result<Option<records::IdempotencyRecord>, Status> {
        let Some(key) = &self.key else {
            return Ok(None);
        };
        let found = context.store.get(key).await.map_err(|e| store_failed(&e))?;
        let Some(found) = found else { return Ok(None) };
        let record: records::IdempotencyRecord =
            keys::decode(&found).map_err(|e| store_failed(&e))?;
        if record.request_sha256 != self.fingerprint {
            return Err(refuse(
                RefusalKind::AlreadyExists,
                "CLIENT_TOKEN_REUSED",
                "client_token was used for another request; use a new one",
            ));
        }
        Ok(Some(record))
    }

    /// Writes it down with what is done.
    pub(crate) fn put(&self, txn: LeaderTxn, task_id: &str, resource_id: &str) -> LeaderTxn {
        let Some(key) = &self.key else { return txn };
        let record = records::IdempotencyRecord {
            schema: 0,
            task_id: task_id.to_owned(),
            request_sha256: self.fingerprint.clone(),
            resource_id: resource_id.to_owned(),
            created_unix_ms: clock::now_ms(),
        };
        txn.absent(key.clone())
            .put(key.clone(), keys::encode(record))
    }
}

//! The dead-letter stream: writes that PostgreSQL refused for good, as they were, with the reason in the headers.

use async_nats::{
    HeaderMap, jetstream::message::PublishMessage, jetstream::stream::RawMessageErrorKind,
};
use birb_nest_core::{Entry, Key, Shard, Version};
use tokio::time::timeout;

use super::{ReadError, Record, Session, streams};
use crate::refusal::chain;

const KEY: &str = "Birb-Key";
const VERSION: &str = "Birb-Version";
const SQLSTATE: &str = "Birb-Sqlstate";
const REASON: &str = "Birb-Reason";

impl Session {
    /// Puts a refused write into the dead-letter stream and returns its sequence there.
    ///
    /// # Errors
    /// [`ReadError`] when it may not be there; doing it again replaces it.
    pub async fn bury(
        &self,
        shard: Shard,
        key: &Key,
        entry: &Entry,
        sqlstate: &str,
        reason: &str,
    ) -> Result<u64, ReadError> {
        let record = Record::Change {
            written_at: entry.written_at,
            expires_at: entry.expires_at,
            state: entry.state.clone(),
        };
        let mut headers = HeaderMap::new();
        headers.insert(KEY, key.as_str());
        headers.insert(VERSION, entry.version.to_string());
        headers.insert(SQLSTATE, sqlstate);
        headers.insert(REASON, reason.replace(['\r', '\n'], " "));
        let message = PublishMessage::build()
            .payload(record.encode())
            .headers(headers);
        let subject = streams::dead_letter_subject(&self.config, shard, key);
        let publishing = async {
            let acknowledgement = self.context.send_publish(subject, message).await?;
            acknowledgement.await
        };
        match timeout(self.config.nats_publish_timeout, publishing).await {
            Ok(Ok(ack)) if ack.sequence > 0 => Ok(ack.sequence),
            Ok(Ok(_)) => Err(ReadError(
                "a dead letter was acknowledged without a sequence".to_owned(),
            )),
            Ok(Err(error)) => Err(ReadError(format!(
                "a dead letter was not taken: {}",
                chain(&error)
            ))),
            Err(_) => Err(ReadError(
                "a dead letter was not acknowledged in time".to_owned(),
            )),
        }
    }

    /// The refused write with this sequence in the dead-letter stream; `None` when it is not there any more.
    ///
    /// # Errors
    /// [`ReadError`] when the stream did not answer, or holds something this release cannot read.
    pub async fn dead_letter(&self, sequence: u64) -> Result<Option<Entry>, ReadError> {
        let stream = self
            .context
            .get_stream_no_info(&self.config.nats_dlq_stream_name)
            .await
            .map_err(|error| ReadError(chain(&error)))?;
        // Any replica may answer a direct get, also one that has not heard of the letter yet; its leader has all of them.
        let message = match timeout(
            self.config.nats_publish_timeout,
            stream.get_raw_message(sequence),
        )
        .await
        {
            Ok(Ok(message)) => message,
            Ok(Err(error)) if matches!(error.kind(), RawMessageErrorKind::NoMessageFound) => {
                return Ok(None);
            }
            Ok(Err(error)) => return Err(ReadError(chain(&error))),
            Err(_) => return Err(ReadError("no answer in time".to_owned())),
        };
        let version = message
            .headers
            .get(VERSION)
            .and_then(|version| version.as_str().parse().ok())
            .and_then(Version::new)
            .ok_or_else(|| ReadError(format!("dead letter {sequence} has no version")))?;
        let record =
            Record::decode(message.payload).map_err(|error| ReadError(error.to_string()))?;
        Ok(record.into_entry(version))
    }

    /// Removes the dead letter of `key`, which is stored now, if it is the one with this sequence. A failure leaves bytes
    /// behind, and nothing else.
    pub async fn exhume(&self, sequence: u64, key: &Key) {
        let removing = async {
            let stream = self
                .context
                .get_stream_no_info(&self.config.nats_dlq_stream_name)
                .await
                .ok()?;
            let message = stream.get_raw_message(sequence).await.ok()?;
            // Should the stream have been lost and made anew, the sequence is somebody else's. The subject says whose:
            // a header comes without the white space at its ends.
            if message.subject.rsplit('.').next() != Some(key.to_token().as_str()) {
                return None;
            }
            stream.delete_message(sequence).await.ok()
        };
        if !matches!(
            timeout(self.config.nats_publish_timeout, removing).await,
            Ok(Some(true))
        ) {
            tracing::debug!(sequence, "dead letter was not removed");
        }
    }
}

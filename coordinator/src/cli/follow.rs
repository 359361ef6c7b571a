//! Watching a job to its end: a progress bar on a terminal, plain lines elsewhere, and what happens with its reason in between.
//!
//! A coordinator that is away for a while is waited for: its death is no news about the job. Ctrl-C ends the watching, not the job.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use everlit_api::client::{Client, Error, EventNews};
use everlit_api::ids::JobId;
use everlit_api::status::{JobState, Summary};
use indicatif::{ProgressBar, ProgressStyle};

use super::{Fail, Output, out};

const ASK_EVERY: Duration = Duration::from_millis(500);
/// Without a terminal a line is written this often at most, unless the state changes.
const LINE_EVERY: Duration = Duration::from_secs(2);
/// A coordinator is waited for this long.
const AWAY_MAX: Duration = Duration::from_secs(120);

/// Follows a job until it is final; an error unless it succeeded.
pub(super) async fn follow(client: &Client, id: JobId, output: Output) -> Result<(), Fail> {
    let mut view = View::new(output);
    let mut events = client.follow_events(Some(id), None);
    let mut events_go_on = true;
    let mut tick = tokio::time::interval(ASK_EVERY);
    let mut away_since: Option<Instant> = None;
    loop {
        tokio::select! {
            _ = tick.tick() => match client.summary(id).await {
                Ok(summary) => {
                    away_since = None;
                    view.show(&summary)?;
                    if summary.state.is_final() {
                        return view.end(&summary);
                    }
                }
                Err(error) => {
                    let since = *away_since.get_or_insert_with(|| { view.say("the coordinator is away: waiting for it"); Instant::now() });
                    if error.problem().is_some_and(|problem| problem.status < 500) || since.elapsed() > AWAY_MAX {
                        return Err(error.into());
                    }
                }
            },
            news = events.next(), if events_go_on => match news {
                Ok(Some(EventNews::Event(event))) => view.say(&format!("{}  {}: {}", event.time, event.event, event.reason)),
                Ok(Some(EventNews::End(_)) | None) => events_go_on = false,
                // The summary tells when the coordinator stays away.
                Err(Error::Problem(_) | Error::Unreachable { .. } | Error::Broken(_)) => events_go_on = false,
            },
            _ = tokio::signal::ctrl_c() => {
                view.clear();
                eprintln!("the job goes on: `everlit get {id}` shows it, `everlit stop {id}` stops it");
                return Err(Fail::Told);
            }
        }
    }
}

/// Where progress is shown.
struct View {
    bar: Option<ProgressBar>,
    json: bool,
    last: Option<(JobState, Option<u64>)>,
    last_line: Instant,
}

impl View {
    fn new(output: Output) -> Self {
        let json = output == Output::Json;
        let bar = (!json && std::io::stderr().is_terminal() && std::io::stdout().is_terminal()).then(|| {
            let bar = ProgressBar::new(1);
            let style = ProgressStyle::with_template("{prefix:>10} [{bar:30}] {pos}/{len} {wide_msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "));
            bar
        });
        Self { bar, json, last: None, last_line: Instant::now() }
    }

    fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => eprintln!("{text}"),
        }
    }

    fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn show(&mut self, job: &Summary) -> Result<(), Fail> {
        if let Some(bar) = &self.bar {
            bar.set_prefix(job.state.as_str());
            bar.set_length(job.total_steps.unwrap_or(1).max(1));
            bar.set_position(job.step.unwrap_or(0));
            bar.set_message(figures(job));
            return Ok(());
        }
        let now = (job.state, job.step);
        let state_changed = self.last.is_none_or(|(state, _)| state != job.state);
        if state_changed || (self.last != Some(now) && self.last_line.elapsed() >= LINE_EVERY) {
            self.last = Some(now);
            self.last_line = Instant::now();
            return if self.json { out::json(job) } else { out::line(&plain(job)) };
        }
        Ok(())
    }

    fn end(mut self, job: &Summary) -> Result<(), Fail> {
        self.clear();
        if self.bar.is_some() {
            out::line(&plain(job))?;
        } else if self.last != Some((job.state, job.step)) {
            self.last = None;
            self.show(job)?;
        }
        if job.state == JobState::Succeeded {
            return Ok(());
        }
        let reason = job.reason.as_deref().unwrap_or("no reason was given");
        Err(Fail::Refused(format!("the job {}: {reason} (`everlit logs {}` has its output)", job.state, job.job_id)))
    }
}

fn plain(job: &Summary) -> String {
    let step = job.step.map_or(String::new(), |step| format!(" step {step}/{}", out::or_dash(job.total_steps)));
    format!("{}{step} {}", job.state, figures(job)).trim_end().into()
}

fn figures(job: &Summary) -> String {
    let mut parts = Vec::new();
    parts.extend(job.loss.map(|loss| format!("loss {loss:.4}")));
    parts.extend(job.steps_per_second.map(|rate| format!("{rate:.1} steps/s")));
    parts.extend(job.eta_seconds.filter(|_| !job.state.is_final()).map(|eta| format!("{} left", out::seconds(eta))));
    if job.restarts > 0 {
        parts.push(format!("{} restarts", job.restarts));
    }
    parts.join(", ")
}

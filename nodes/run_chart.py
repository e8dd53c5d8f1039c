"""A run's curves as a picture."""

from comfy_api.latest import io

from .common import types


class RetuneRunChart(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RetuneRunChart",
            display_name="Run Chart",
            category="retune/training",
            description="Loss (raw and smoothed), validation loss, text gap and loss per noise level of a run, and the "
            "demo model's alignment, read from its folder.",
            search_aliases=["loss graph", "loss curve"],
            is_output_node=True,
            inputs=[types.Run.Input("run", tooltip="From a training node.")],
            outputs=[
                io.Image.Output(tooltip="The chart."),
                types.LossMap.Output(display_name="loss_map", tooltip="The losses, for ComfyUI's own Plot Loss Graph."),
            ],
        )

    @classmethod
    def execute(cls, run):
        from comfy_api.latest import ui

        from ..training.plots.run_chart import run_chart
        from ..training.runs.folder import RunFolder
        from ..training.runs.records import as_written

        folder = RunFolder(run)
        rows = folder.rows()
        with as_written(folder.path):
            image = run_chart(folder.name, rows)[None]
        losses = [row["loss"] for row in rows if "event" not in row]
        return io.NodeOutput(image, {"loss": losses}, ui=ui.PreviewImage(image, cls=cls))
